"""Which of FFmpeg's demuxers may read a foreign file: those of videos that lie whole in one file.

FFmpeg goes by content, whatever a file is called. A playlist (``hls``, ``concat``, ``dash``, ``imf``), a session
description (``sdp``) or a numbered series (``image2``, ``mlv``) would make it open other files or addresses, a text
(``tty``) draw pictures of itself. Pictures and sound are refused with them.
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
"""For `av.open`. What a demuxer opens by itself goes by the same options."""
