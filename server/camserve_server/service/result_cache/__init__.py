"""The result cache: responses that are used again for equal requests, in memory and in Redis."""
