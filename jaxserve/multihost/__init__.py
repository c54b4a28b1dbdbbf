"""One engine over the devices of several hosts: a process on each, led by process 0, which alone schedules and serves.

Process 0 sends the others what it does on the devices (leading_runner.py), and they do the same (worker.py); the devices meet
through jax.distributed. Nothing else of jaxserve knows of it.
"""
