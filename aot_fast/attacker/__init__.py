"""The image editor that attacks: loading, sampling, replay, reward and the Flow-GRPO update."""
