"""The parts of launch/pretrain.py, prepare.py, json_lines.py and quickstart.py."""
