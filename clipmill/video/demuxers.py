"""FFmpeg's demuxers that may read untrusted files: only formats that keep a whole video in one file.

FFmpeg detects the format by content and ignores the file name. A playlist (``hls``, ``concat``, ``dash``, ``imf``), a
session description (``sdp``) or a numbered series (``image2``, ``mlv``) would make it open other files or addresses,
and text (``tty``) would be drawn as pictures. Still pictures and audio are refused as well.
"""

from __future__ import annotations

__all__ = ["OPTIONS"]

_CONTAINERS = (
    "mov matroska webm avi asf asf_o flv live_flv kux mpeg mpegts mpegtsraw mxf gxf lxf nut nuv nsv ogg rm ivr wtv ty "
    "swf dv gif apng jpegxl_anim ivf yuv4mpegpipe pva pmp r3d cine"
)
_STREAMS = (
    "h261 h263 h264 hevc vvc obu av1 avs2 avs3 cavsvideo dirac vc1 vc1test mpegvideo m4v mjpeg mjpeg_2000 mpjpeg "
    "smjpeg ingenient apv evc dnxhd"
)
_CAMERAS = "dhav hxvs ifv iv8 lmlm4 luodat lvf mgsts msnwctcp mxg nc pdv sdr2 ser simbiosis_imx vivo"
_GAMES = (
    "4xm anm argo_brp avs bethsoftvid bfi bink bmv c93 cdg cdxl dfa dsicin dxa ea film_cpk filmstrip flic frm gdv hnm "
    "idcin iff ipmovie ipu jv mm mods moflex mtv mv mvi paf psxstr rl2 roq rpl sga siff smk smush thp tiertexseq tmv "
    "usm vividas vmd wc3movie xmv yop"
)

OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": ",".join(" ".join((_CONTAINERS, _STREAMS, _CAMERAS, _GAMES)).split()),
}
"""Options for `av.open`. They also apply to files that a demuxer opens itself."""
