"""Probing a frozen backbone on a folder of images. The model is that of the run given as checkpoint, or model.name."""

from saccade.train.data.folder import ImageFolder

model = dict()
data = dict(type=ImageFolder)
batch_size = 128
workers = 2
