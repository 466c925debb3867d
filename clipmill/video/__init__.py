"""The only door to codecs: probing, decoding in a killable child, encoding, pictures."""

from __future__ import annotations

from clipmill.video.encode import decode_mp4, encode_mp4, write_raw_video
from clipmill.video.jpgs import decode_jpgs, encode_jpgs
from clipmill.video.probe import VideoError, VideoInfo, probe
from clipmill.video.sandbox import BadVideo, Clip, Decoder, DecoderLost, Limits, Outcome

__all__ = [
    "BadVideo",
    "Clip",
    "Decoder",
    "DecoderLost",
    "Limits",
    "Outcome",
    "VideoError",
    "VideoInfo",
    "decode_jpgs",
    "decode_mp4",
    "encode_jpgs",
    "encode_mp4",
    "probe",
    "write_raw_video",
]
