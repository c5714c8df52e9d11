"""What several tests share: toys, planted data, ranks, kills. Not collected."""
