"""Reading the frames of a video: one module a decoder, and what they share.

`whole.py` is the entrance. ``by_*.py`` read with one library each; `damage.py` drops damaged frames, `clocks.py` tells
the time, `interlaced.py` makes whole pictures. The modules are imported one by one: `clipmill.video.probe` needs some
of them, and others need it.
"""
