"""What is seen and touched in a browser: the site of features, and the playground."""
