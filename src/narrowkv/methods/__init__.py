"""Recipes: one method, one file; each chooses schemes and names them."""

from narrowkv.methods.recipe import Choices, LayerSchemes, Recipe
from narrowkv.methods.registry import get_recipe, recipe_names

__all__ = ["Choices", "LayerSchemes", "Recipe", "get_recipe", "recipe_names"]
