"""A state for people to look at. Importing this teaches notebooks to show one."""

from jaxkv.view import notebook as notebook
from jaxkv.view.draw import draw as draw
