"""Recipes: one method, one file; each chooses schemes and names them."""

from narrowkv.methods.recipe import LayerSchemes, Recipe, SearchSpace
from narrowkv.methods.registry import get_recipe, recipe_names

__all__ = ["LayerSchemes", "Recipe", "SearchSpace", "get_recipe", "recipe_names"]
