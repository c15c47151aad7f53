"""The baseline DMD2 and the sibling papers DMDR and AdvDMD: each a whole method in a file of its own.

Each file has Settings (its flags, and its own values of the common ones), prepare(nets) (what it adds to the networks) and
iterate(nets, batch, n) (its lines 5-26 of Algorithm 1). train.py imports the one that --method names.
"""
