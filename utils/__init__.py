"""What two experiments share exists once in here; see docs/architecture.md for the map."""
