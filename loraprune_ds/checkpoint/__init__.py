"""What a run resumes from: layout, writing, reading."""
