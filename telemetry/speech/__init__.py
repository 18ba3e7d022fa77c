"""What hears generated speech: whose voice is it, and which words does it say?"""
