"""Reading the frames of a video: one module per decoder, and what they share.

`whole.py` is the entry point. ``by_*.py`` read with one library each, `damage.py` drops damaged frames, `clocks.py`
computes times, `interlaced.py` deinterlaces. Import the modules one by one: `clipmill.video.probe` needs some of them,
and others need it.
"""
