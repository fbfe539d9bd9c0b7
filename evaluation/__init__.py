"""How a trained model is judged.

obedience    does it draw what it is asked for? R-precision by a CLIP, and the colours of monsters
"""
