"""Trackers that get a copy of each round: `[record] mirror`.

A tracker's library starts threads and services, takes over signals and may wait for a disk. So it lives in a process of its own
(`copying.py`), which reads the rows from the run file; rank 0 tells it which rows stand there (`sender.py`), and waits for nothing.
"""
