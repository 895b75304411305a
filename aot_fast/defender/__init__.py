"""The vision-language model under attack: prompts, rollout, rewards and DAPO."""
