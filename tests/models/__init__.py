"""Real models: the table (`zoo`), small networks in plain torch.nn (`networks`), and the tests over both."""
