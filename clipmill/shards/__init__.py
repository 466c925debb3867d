"""The one on-disk format that all stages share: tars, commit records, manifests, and the order to read them in.

`clipmill.shards.dataset` alone needs torch: planning and verifying do not.
"""
