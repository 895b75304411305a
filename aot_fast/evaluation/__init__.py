"""What is measured about the game: answers scored, tables of predictions, and the figures of the attacker x defender matrix."""
