"""Three applications on the public interface of shoal and its server; each is one command."""
