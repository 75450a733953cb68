"""Judging a frozen backbone on a folder of images."""

from saccade.train.data.folder import ImageFolder

model = dict(name="biformer_t")
data = dict(type=ImageFolder)
batch_size = 128
workers = 2
