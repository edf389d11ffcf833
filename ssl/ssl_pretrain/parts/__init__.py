"""Building blocks of pretext methods: masks, teachers, heads, losses, targets."""
