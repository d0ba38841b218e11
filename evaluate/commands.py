"""`relish evaluate | predict | demo`."""
def register(app): pass
