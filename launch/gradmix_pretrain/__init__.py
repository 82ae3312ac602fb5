"""The parts of launch/pretrain.py, prepare.py, json_lines.py, quickstart.py and compare.py."""
