"""Installed as saccade.timm: `python -m saccade.timm SCRIPT …`. (A folder called timm would shadow timm itself.)"""
