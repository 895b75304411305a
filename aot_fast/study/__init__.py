"""A study: the arms and seeds of one configuration, played as runs of their own and compared."""
