"""Other libraries' names for the zoo's backbones. Each module needs its library, and nothing here imports them."""
