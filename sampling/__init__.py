"""What stands around the samplers when a prompt becomes an image.

request    what may be asked of sampling, checked before any network runs
packed     the U-Net on a CPU: weights in the order that it computes in
"""
