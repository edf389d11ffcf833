"""What several pretext methods share: masks, teachers, heads, losses, targets."""
