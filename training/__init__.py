"""What the training scripts share; the loops and the steps themselves are in the scripts, since they are what you read.

`presets` (every option and hyper-parameter) and `options` (how they are read) · `script` (how a script stops and fails)
· `run_folder` (files that are whole or not there) · `reproducible` (randomness, processes, average) · `reporter` (the
clock of the loop) · `reconstruction` (how good a VAE is) · `clip_model` · `memory_forecast` (whether it will fit) ·
`captioned_folder`, `image_files`, `encoded_cache`, `background` (captioned images read, checked and encoded once).
"""
