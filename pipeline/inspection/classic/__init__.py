"""Reads a finished run of the CNN-LSTM tutorial, two checkpoints and a pickle, and makes a model.

The tutorial is `tutorials/03-advanced/image_captioning` of https://github.com/yunjey/pytorch-tutorial.
"""
