"""The published recipes, one table for each folder of configs."""
