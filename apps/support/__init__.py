"""Customer service: finds the passage that answers a question, or says that it does not know."""
