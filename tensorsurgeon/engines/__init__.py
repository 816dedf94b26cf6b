"""What each serving engine accepts and refuses."""
