"""Keys and values of rows of different length (`kv_cache`), and where the tokens of a pass go (`layout`). Imports: nothing of this
package.
"""
