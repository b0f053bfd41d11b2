"""What two experiments share, once."""
