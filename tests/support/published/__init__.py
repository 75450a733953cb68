"""The recipes as they were published, one table for each folder of configs."""
