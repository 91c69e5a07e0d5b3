"""The same client and coordinator code, many clients, one machine."""
