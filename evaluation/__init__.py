"""How a trained model is judged, and the report on it.

obedience      does it draw what it is asked for? R-precision by a CLIP, and the colours of monsters
attributes     which words of a caption does an image obey?
copying        how near samples come to training images
timestep_loss  how well the noise is predicted, by tenths of the timesteps
attention      where each word looks, as maps and as scores
statistics     intervals, KID, precision, recall and coverage
report         all of it in words
"""
