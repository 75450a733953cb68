"""Installed as saccade.timm: `python -m saccade.timm SCRIPT …`. (A folder called timm here would hide timm itself.)"""
