"""Measurements that the README quotes, each a script that makes them again.

quickstart    which recipe of the `monsters` preset paints best in the same time
"""
