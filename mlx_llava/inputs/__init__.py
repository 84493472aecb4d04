"""What a user has -> Inputs."""
