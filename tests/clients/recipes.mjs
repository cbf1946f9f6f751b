// What the recipes of one client share; see recipes.py.
export const URL = process.env.OCTAVO_URL;
export const BASE = URL + "/v1";
export const MODEL = process.env.OCTAVO_MODEL;
export const QUESTION = "What is the capital of France?";
export const PARAMETERS = {
  type: "object", properties: { city: { type: "string", maxLength: 30 } }, required: ["city"], additionalProperties: false,
};

export function check(condition, about) {
  if (!condition) throw new Error(`not as it should be: ${JSON.stringify(about)}`);
}

export async function run(recipes) {
  let failed = false;
  for (const [name, recipe] of Object.entries(recipes)) {
    const start = performance.now();
    let trouble = "";
    try {
      await recipe();
    } catch (error) {
      failed = true;
      trouble = String(error);
      console.error(error);
    }
    console.log(JSON.stringify({ recipe: name, seconds: (performance.now() - start) / 1000, trouble }));
  }
  process.exit(failed ? 1 : 0);
}
