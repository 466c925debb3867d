"""The one on-disk format that all stages share: tars, commit records, manifests, and the order to read them in.

Only `clipmill.shards.dataset` and what it loads batches with need torch; planning and verifying do not.
"""
