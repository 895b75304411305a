"""What passes between the players: questions with images, edits, verdicts; and the synthetic world."""
