"""The host's helper programs, proxies, certificate authorities and ssh agent."""
