"""Recovery data: chats that a model writes itself."""
