"""What this host has: helper programs, proxies, certificate authorities, the ssh agent."""
