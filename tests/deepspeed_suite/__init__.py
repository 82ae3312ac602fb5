"""DeepSpeed's own tests of its data parallelism, stock and with ds_gradmix switched on in every engine.

    make test-deepspeed DEEPSPEED=<a checkout of DeepSpeed>

`run.py` is the command, `files.py` the list, `inject.py` what acts inside of those tests, `compare.py` the
verdict. DeepSpeed itself is the installed one; the checkout only has the tests.
"""
